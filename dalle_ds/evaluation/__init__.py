"""How well pictures match their captions, and what a dVAE keeps of them."""
