"""From a prompt to tokens: the engine, its server and the client of its socket."""
