"""What people watch while a run goes on: consoles, progress bars, notebooks; knows records alone."""
