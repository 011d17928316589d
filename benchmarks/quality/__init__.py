"""``python -m benchmarks.quality``: does SRT help on real labels, at what cost?"""
