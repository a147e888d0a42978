"""Build the streams ("hard instances") of the theorems' proofs, and play a game on each: one file per theorem.

In a game, Alice hides rows of dv values in the state of a method (the memory of a KV cache). Bob restores the state
from its bytes (the message), and reads each hidden row by one query. The game of one theorem is called a barrier.
"""
