"""Play the INDEX game: Alice hides bits in the state of a method, and Bob decodes them from the state's bytes.

A method is a way to keep a KV cache; its state is the memory that it keeps of a stream of tokens. INDEX is the
communication game from which the memory theorems derive. A hidden row is the dv values that one of Bob's queries reads;
the message is the bytes of Alice's state.
instance      what both sides know: keys, Alice's stream, Bob's queries
secret        what only Alice knows: the hidden values
play          sends the message from one process to another
asking        queries a state
decode        reads the hidden bits from the answers
predict, certificates   prove from the decoded bits how many bits the message carries
result        gives the verdict
public_bits   the smallest method for one of the games: it stores nothing but the hidden bits
probing_readers   simple rules for choosing which scores q.k to compute, to compare methods with in the game about time
"""
