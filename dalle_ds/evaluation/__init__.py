"""How well pictures match their captions."""
