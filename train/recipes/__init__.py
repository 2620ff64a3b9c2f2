"""The published runs as values. TODO"""
