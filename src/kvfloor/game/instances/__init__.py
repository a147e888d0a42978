"""Build the hard instances of the memory theorems; each theorem is one barrier, in one file.

In all instances Alice hides rows of dv values in the state of a method, and Bob, who restores the state from its bytes
(the message), reads each hidden row by one query.
"""
