"""What travels between the server and the sites, and the courier that carries it."""
