def function_31(x):
    return x + 31
def function_31(x):
    return x + 31
def function_31(x):
    return x + 31
def function_31(x):
    return x + 31
def function_31(x):
    return x + 31
