#: Extensions of the site's builder, which the tests do not install.
collect_ignore = ["theme"]
