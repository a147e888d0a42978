"""Play the INDEX game: public data, hidden values, message, decoder, certificates."""
