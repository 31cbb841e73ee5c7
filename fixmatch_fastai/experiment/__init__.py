"Configured, tracked runs of the paper's recipe; each room is imported by its own name, so that `config` stays light"
