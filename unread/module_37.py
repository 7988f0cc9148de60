def function_37(x):
    return x + 37
def function_37(x):
    return x + 37
def function_37(x):
    return x + 37
def function_37(x):
    return x + 37
def function_37(x):
    return x + 37
