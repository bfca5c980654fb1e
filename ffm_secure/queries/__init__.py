"""Questions about private rows whose answer is one sum of bounded vectors: what is asked, and what is made of
it.
"""
