"""Images decoded once, and mapped into memory by every later run: `python -m domainbed_ext.cache list|build|remove`.

images       the cached images of environments: opened, or decoded the first time
variants     the sizes at which images are kept
fingerprint  what tells a list of image files from another, without reading all of them at each start
decode       from image files to pixels; all that processes that decode load
pixels       the file format: arrays in one memory map
entries      where the cache is, how large it may grow, and its entries, each there whole or not at all
command      the command line
"""
