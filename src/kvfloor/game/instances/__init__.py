"""Build the hard instance of each memory theorem (a barrier), one barrier per file.

In all of them Alice hides rows of dv values in the state of a method, and Bob, who restores the state from its bytes
(the message), reads each hidden row by one query.
"""
