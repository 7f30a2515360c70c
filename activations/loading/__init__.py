"""Reading rows of a harvest in an order that each epoch shuffles anew."""
