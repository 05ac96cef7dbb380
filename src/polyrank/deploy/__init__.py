"""A deployment of polyrank over Flower: its keys and certificates, its processes, its runs.

    certificates   the authority, the server's certificate, a key pair a node
    layout         what lies where in a deployment's folder and in a node's, and in what environment Flower runs
    templates      the text files that `provision` writes
    provision      a deployment's folder: init, add, renew
    supervise      keeps processes running, in the background; the standard library alone
    control        Flower's command line, as functions
    operate        the server: up, register, remove, status, down
    join           a node
    follow         a run: submit, follow, submit again
"""
