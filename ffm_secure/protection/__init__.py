"""What hides one update from the server: a codec, and a client and a server side for every protection."""
