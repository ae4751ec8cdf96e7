from adapterhub.cli.app import main

main()
