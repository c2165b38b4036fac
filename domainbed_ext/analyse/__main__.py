"""Runs the command."""

if __name__ == "__main__":
    from domainbed_ext.analyse.command import main

    main()
