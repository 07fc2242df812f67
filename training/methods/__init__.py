"""What can be trained: one file per method and one table that names them."""
