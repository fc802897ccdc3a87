"""Operations: one thin function for each AWS operation, and the ASGI app."""
