"""One file a job, named by the table it writes; preprocess runs slides, features and patients; submit brings any of them to a
cluster; runtime/ is what they share.
"""
