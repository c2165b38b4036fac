"""Images decoded once, and mapped into memory by every run after: `python -m domainbed_ext.cache list|build|remove`.

images     an environment's images as they are kept: opened, or made
variants   at which size they are kept
content    what tells a list of image files from another, without reading them at each start
decode     from image files to pixels; all that the processes that do it load
pixels     the file format: arrays in one memory map
entries    a bounded folder of entries, each there whole or not at all
locks      one builder at a time
place      where the cache lies, and how large it may grow, unless told
command    the command line
"""
