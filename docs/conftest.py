#: Extensions of the site's builder, which the tests do not install, and what draws the gallery.
collect_ignore = ["theme", "gallery"]
