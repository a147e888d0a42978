"""Play the INDEX game: public half, secret half, message, decoder, certificates."""
