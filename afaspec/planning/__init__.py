"""What capture, training and bench will take, before they are begun."""
