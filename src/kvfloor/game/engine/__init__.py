"""Play the INDEX game: Alice hides bits in the state of a method, and Bob decodes them from the state's bytes.

Files: public half, secret half, message, decoder, certificates.
"""
