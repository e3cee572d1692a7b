"""Machine code for the CPU, where XLA's is the limit: written in Python, compiled by LLVM (llvmlite).

`emit` writes functions, `ffi` lets XLA call them, `threads` shares a call with XLA's own threads, and
`targets` compiles and registers what a program asks for by name.
"""
