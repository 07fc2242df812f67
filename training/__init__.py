"""Trains draft heads: the model's own answers, frozen-backbone training, measured acceptance.

May import `server` and `heads`; nothing but `bench` may import it. Run it as `python -m training`.
"""
