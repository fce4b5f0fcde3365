"""What a step costs on machines that are not here, read from the program compiled for them."""
