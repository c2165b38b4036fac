"""Data sets, from wherever they are to where DomainBed expects them: `python -m domainbed_ext.prepare NAME`.

sources    where each data set comes from, and how many images it should have
fetch      a download that goes on where it was cut off
archives   unpacking what may be broken, or hostile
layout     which file goes where; cct20 and domain_net for the two that take more than finding folders
images     an image file's size, hash and whether it decodes
verify     counts, hashes and the manifest
command    the command line
"""
