"""What people look at: the terminal and figures, made from records alone."""
