"""Where the sites live: engines carry bytes between the server and them."""
