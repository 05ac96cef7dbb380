"""A deployment of polyrank over Flower: what server and clients run, and keys, processes and runs around it.

server         the server's Flower app
client         a client's Flower app
site           what a client has, and how it answers
keeper         keeps a site's model loaded
certificates   the authority, the server's certificate, a key pair a node, signatures
layout         what lies where in a deployment's folder and in a node's, and in what environment Flower runs
templates      the text files that `provision` writes
provision      a deployment's folder: init, add
renewal        the server's certificate and the authority, anew
enrolment      a site's request and the server's answer, as files
identity       a site's folder: its key, its request, the answer
registry       who may take part, until when; which keys never again
registrar      makes Flower's SuperLink be as the registry says
expiry         what ends when
supervise      keeps processes running, in the background; the standard library alone
control        Flower's command line, as functions
operate        the server: up, register, remove, status, down
join           a node
follow         a run: submit, follow, submit again
"""
