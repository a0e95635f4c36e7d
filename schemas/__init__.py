"""What an agent sends and gets back: pydantic models, no numpy.

arguments    shared argument types          reading    captures, lenses, tracks, vocabulary
session      models, handles, tokens        effects    interventions, generation, cache injection
base         what all of them share          jobs       calls that go on by themselves
"""
