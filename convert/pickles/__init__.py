"""The closed pickle reader. TODO"""
