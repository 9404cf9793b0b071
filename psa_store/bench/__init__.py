"""`psa bench`: a step of psa beside its peers and the limits of the machine, measured alternately in one run.

Nothing is computed: the gradients exist already, and a step is to bring them together, to update the parameters, and to
let every worker see the new ones. All contenders are alive all the time; one works while the others wait on a pipe or
a socket. A run is rounds of blocks of steps, one block of each contender in a round, so that a machine that slows
down slows all of them down. Afterwards each contender must prove that its parameters are what the steps give.

``request`` says what to measure, ``driver`` measures, ``results``, ``targets`` and ``curve`` draw conclusions,
``report``, ``document`` and ``chart`` show them.
"""
