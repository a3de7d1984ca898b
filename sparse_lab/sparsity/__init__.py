"""The core, on torch alone: masks, scores, distribution, schedules, selection, and what a mask does to a network's
paths.
"""
