"""``python -m research.quality``: quality on real labels against cost."""
