"""``python -m research.quality``: does SRT help on real labels, at what cost?"""
