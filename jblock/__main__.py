"""`python -m jblock`: the command `jblock`."""

from jblock.command import run

if __name__ == "__main__":
    run()
