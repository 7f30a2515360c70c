"""What the page Circuits is made of: graphs that are saved, what is chosen of one, its drawing."""
