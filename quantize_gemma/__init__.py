"""The installed package. In the repository, its folders are symbolic links to the folders of the same names.

The links keep packages called `tasks` and `flows` out of the top of site-packages.
"""
