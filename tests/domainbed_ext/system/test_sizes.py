from domainbed_ext.system.sizes import GB, format_size


def test_sizes_have_decimal_units():
    sizes = [format_size(count) for count in (12, 2048, 3.46 * GB, 2e12)]
    assert sizes == ["12 bytes", "2.0 kB", "3.5 GB", "2.0 TB"]
