"""The package as it is installed. In the repository its folders are links to those beside it, so nothing called `tasks`
or `flows` is put at the top of site-packages."""
