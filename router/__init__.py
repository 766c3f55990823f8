"""The router: text in, text out. Tokenises, places, relays, resumes. Alone knows text; imports no torch."""
