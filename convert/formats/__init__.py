"""Source formats: which tensor of a file is which leaf of the model. TODO"""
