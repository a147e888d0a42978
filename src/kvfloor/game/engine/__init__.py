"""Play the INDEX game: Alice hides bits in the state of a method, and Bob decodes them from the state's bytes.

INDEX is the communication game from which the memory theorems derive. A hidden row is the dv values that one of Bob's
queries reads; the message is the bytes of Alice's state. Files: `instance` has the public half of a game and `secret`
the hidden half; `play` sends the message; `asking` queries a state; `decode` reads the hidden bits from the answers;
`predict` and `certificates` bound the bits that the message carries; `result` gives the verdict.
"""
