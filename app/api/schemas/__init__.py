"""What goes over the wire. Every field says what it means and shows an example, so that /docs teaches."""
