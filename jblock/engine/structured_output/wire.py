"""What the engine and the process of its grammars tell each other: lists of these, as msgpack frames."""

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, tag=str.lower):
    """Base of all messages; the tag is the class's name in lower case."""


# To the process.


class Begin(Message, frozen=True):
    """A sequence that is to keep to a grammar.

    Attributes:
      id: of the sequence, for all that follows.
      tokenizer: file of the tokenizer.
      vocab_size: ids of the model.
      end_ids: of the model, allowed where the grammar may end; empty: as the tokenizer says.
      grammar: as llguidance writes it.
      tokens: that the sequence has so far.
    """

    id: int
    tokenizer: str
    vocab_size: int
    end_ids: tuple[int, ...]
    grammar: str
    tokens: tuple[int, ...]


class Take(Message, frozen=True):
    """A sequence has one more token."""

    id: int
    token: int


class End(Message, frozen=True):
    """A sequence is over."""

    id: int


# From the process.


class State(Message, frozen=True):
    """Where a sequence stands.

    Attributes:
      id: of the sequence.
      count: how many tokens it has.
      mask: little-endian bits, one a token id: those that may follow; empty where none may.
      problem: why nothing may follow; "": the grammar is complete.
    """

    id: int
    count: int
    mask: bytes = b""
    problem: str = ""


ToWorker = Begin | Take | End
encoder = msgspec.msgpack.Encoder()
to_worker = msgspec.msgpack.Decoder(list[ToWorker])
to_engine = msgspec.msgpack.Decoder(list[State])
