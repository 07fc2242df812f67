"""What is run and how: contenders at batch 1, other programs' servers, loops of many clients."""
